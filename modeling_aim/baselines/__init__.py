"""Training-free ways to answer from demonstrations that others have published, on any backbone, without AIM's weights.

`methods.py` has them, each a short function with its paper; `BASELINES` names them for `aim eval` and `aim bench`.
"""
