"""The card of a demonstration bank: what its repository says about itself."""

from __future__ import annotations

from collections.abc import Mapping

from .contents import BankContents


def bank_card(bank: BankContents, source: Mapping[str, str]) -> str:
    """What a repository that holds `bank` says about itself, where `source` read it."""
    rows = "".join(f"| {name} | {value} |\n" for name, value in sorted(source.items()))
    labels = [label for label in dict.fromkeys(bank.labels()) if label is not None]
    named = f"\n\nLabels: {', '.join(labels[:30])}{' and more' if len(labels) > 30 else ''}." if labels else ""
    return f"""---
library_name: transformers
tags: [aim, demonstration-bank, few-shot]
---

# Demonstration bank

{len(bank)} demonstrations, read once by an [AIM](https://arxiv.org/abs/2406.07588) plug-in and kept as
{bank.num_tokens} fused virtual tokens of width {bank.width}. Their words, and small pictures of their images where the
bank was built with them, are in the files too.{named}

Only the plug-in that read them can use them:

| | |
|---|---|
{rows}
```python
from modeling_aim import DemonstrationBank

bank = DemonstrationBank.from_pretrained("this/repository", model)
model.generate(**inputs, demos=bank, shots=8, select="image")
```

Files are safetensors and JSON; nothing is unpickled.
"""
