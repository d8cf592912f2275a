"""Training-free ways to answer from demonstrations that others have published, on any backbone, without AIM's weights.

`methods.py` has them, each a short function with its paper; `RIVALS` names them. `aim eval` and `aim bench` run them.
"""
