"""Time and memory of running a model as the proof of `surgery upcycle` does: layer by layer, expert by expert.

    surgery upcycle .cache/models/SmolLM2-135M-Instruct /tmp/moe --experts 8 --top-k 2 --strategy copy --no-verify
    python bench/proof.py /tmp/moe --tokens 128
    python bench/proof.py /tmp/moe --tokens 128 --kind bfloat16 --device cuda

`peak` is the memory above a process that has imported what the model needs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--kind", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--room", type=int, default=32, help="MiB of a block of rows")
    args = parser.parse_args()

    from surgery.formats.registry import open_checkpoint
    from surgery.running.before_head import before_head
    from surgery.running.device import device
    from surgery.running.layerwise import bytes_of_a_pass, empty_model
    from surgery.tensors.memory import Peak
    from surgery.upcycling.proof import prose_tokens

    model, on = open_checkpoint(args.model), device(args.device)
    tokens, text = prose_tokens(model, args.tokens)
    empty_model(model, args.kind)  # imports transformers' modules
    peak, began = Peak(), time.monotonic()
    before_head(model, tokens, args.kind, on, room=args.room << 20)
    seconds, grown, size = time.monotonic() - began, peak.bytes() / 1e6, bytes_of_a_pass(model) / 1e9
    print(f"{tokens.numel()} tokens of {text} in {args.kind} on {on.name}: {seconds:.1f} s, {size:.2f} GB of weights,"
          f" peak {grown:.0f} MB above imports")  # fmt: skip


if __name__ == "__main__":
    main()
