"""Data that training and evaluation share: files, rows, tables, images and pairs, found and read."""
