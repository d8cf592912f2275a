"""Share a bank: push it, open it elsewhere, and see that another model is refused.

    python examples/bank_on_the_hub.py --repo-id me/shapes-bank      # logged in with `hf auth login`
    python examples/bank_on_the_hub.py                # on localhost, no account; the tests' Hub (pip install pytest)

A bank on the Hub is safetensors and JSON with a card. Whoever has the same plug-in uses it without reading an image.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def share(repo: str, repo_id: str, token: str | None) -> None:
    """Build, push, open again, ask."""
    import torch
    from lesson import ask, load, shapes

    from modeling_aim import DemonstrationBank

    model, processor = load(repo)
    demos, queries = shapes(ways=2, shots=4)
    with tempfile.TemporaryDirectory() as folder:
        bank = DemonstrationBank.build(model, demos, folder, thumbnails=0)  # without pictures
        bank.push_to_hub(repo_id, token=token)
    bank = DemonstrationBank.from_pretrained(repo_id, model, token=token)
    print(f"{repo_id}: {len(bank)} demonstrations, read by {bank.source['backbone']}")
    for image, name in queries:
        print(f"  {name:10} {ask(model, processor, image, demos=bank)}")
    with torch.no_grad():
        model.projector.layers[-1].weight.mul_(1.5)  # as if it had been trained further
    try:
        DemonstrationBank.from_pretrained(repo_id, model, token=token)
    except ValueError as error:
        print(f"Another projector: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--repo", default=str(HERE.parent / "hub_configs" / "aim-tiny"), help="AIM repository: a folder or a Hub id"
    )
    parser.add_argument("--repo-id", help="repository of the bank; without it, one on localhost")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        repo_id, token = args.repo_id, None
        if repo_id is None:
            sys.path.insert(0, str(HERE.parent / "tests"))
            from hub_server import HubServer

            hub: Any = stack.enter_context(HubServer(home=Path(stack.enter_context(tempfile.TemporaryDirectory()))))
            environment = hub.env()  # set before huggingface_hub is imported, which reads it once
            os.environ.clear()
            os.environ.update(environment)
            repo_id, token = "user/shapes-bank", hub.token
        share(args.repo, repo_id, token)


if __name__ == "__main__":
    main()
