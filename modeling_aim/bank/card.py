"""The card of a demonstration bank: what its repository says about itself."""

from __future__ import annotations

from collections.abc import Mapping

from .contents import BankContents


def bank_card(bank: BankContents, source: Mapping[str, str]) -> str:
    """What a repository that holds `bank` says about itself, where `source` read it."""
    rows = "".join(f"| {name} | {value} |\n" for name, value in sorted(source.items()))
    labels = [label for label in dict.fromkeys(bank.labels()) if label is not None]
    named = f"\n\nLabels: {', '.join(labels[:30])}{' and more' if len(labels) > 30 else ''}." if labels else ""
    shots = min(8, max(len(bank), 1))
    return f"""---
library_name: transformers
license: other
license_name: that-of-the-demonstrations
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
from modeling_aim import AimForConditionalGeneration, DemonstrationBank

model = AimForConditionalGeneration.from_pretrained("the/plug-in")
bank = DemonstrationBank.from_pretrained("this/repository", model)
inputs = model.processor(images="query.png", text=model.processor.prompt("What is this?"), return_tensors="pt")
inputs = inputs.to(model.device, model.dtype)
ids = model.generate(**inputs, demos=bank, shots={shots}, select="random", max_new_tokens=8)
print(model.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

`select="image"` chooses by likeness, where the bank has features. `revision="..."`, a full commit hash, pins what you
have looked at. The words and pictures have the licence of the data that they come from. Files are safetensors and
JSON; nothing is unpickled.
"""
