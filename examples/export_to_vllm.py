"""Few-shot answers from vLLM: the prompt with fused demonstrations in it, handed over as embeddings.

    python examples/export_to_vllm.py --output prompt.safetensors
    python examples/export_to_vllm.py --repo me/llava-1.5-7b-aim --engine llava-hf/llava-1.5-7b-hf      # needs vllm

vLLM's `prompt_embeds` replace the whole prompt: what the backbone's decoder would see, images and fused tokens in it.
This works for backbones whose decoder needs nothing but embeddings (LLaVA and its kin, Idefics2, Idefics3, SmolVLM).
It cannot work for Qwen-VL, whose decoder also needs each position's place in the image grid; `prompt_embeds` refuses
such backbones. Before anything is handed over, transformers answers from the embeddings alone, and must agree.

Let only callers you trust send embeddings to an engine: wrong shapes can crash it, and any content is a prompt.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from lesson import AIM_TINY, load, shapes
from safetensors.torch import save_file


def from_vllm(engine: str, embeddings: torch.Tensor) -> str:
    """What vLLM answers; `engine` is the backbone's own repository."""
    from vllm import LLM, SamplingParams  # not a dependency of this project

    served: Any = LLM(model=engine, enable_prompt_embeds=True)
    output = served.generate({"prompt_embeds": embeddings}, SamplingParams(temperature=0.0, max_tokens=8))
    return output[0].outputs[0].text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", default=AIM_TINY, help="AIM repository: a folder or a Hub id")
    parser.add_argument("--engine", help="the backbone for vLLM to serve; without it, only the export is shown")
    parser.add_argument("--output", type=Path, help="file for the embeddings")
    args = parser.parse_args()

    model, processor = load(args.repo)
    demos, queries = shapes(ways=2, shots=4)
    image, name = queries[0]
    inputs = processor(images=image, text="<image> this is", return_tensors="pt")
    fused = model.read(demos)
    embeddings = model.prompt_embeds(inputs, demos=fused)[0]
    print(f"{tuple(embeddings.shape)} embeddings, {fused.num_tokens} of them fused, for a query of the name {name}")

    with torch.no_grad():
        wanted = model(**inputs, demos=fused).logits[0, -1]
        logits = model.backbone(inputs_embeds=embeddings[None]).logits[0, -1]
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)
    print("transformers gives the same logits from the embeddings alone")
    if args.output is not None:
        save_file({"prompt_embeds": embeddings.contiguous()}, args.output)
    if args.engine is not None:
        print("vLLM:", from_vllm(args.engine, embeddings))


if __name__ == "__main__":
    main()
