"""What few-shot prompting costs: counted and measured."""
