"""Train the built-in model on prose, code and synthetic chain-of-thought tasks.

    python train.py --data DATA --out RUN --budget 1350

DATA is what prep.py wrote.  The learning rate follows the clock, so the run is annealed when the budget (in seconds) is spent.
Writes ckpt.npz and final.npz (weights for export.py), validation.json and log.txt.  Needs torch, numpy and tokenizers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

from command_line import add_force, claim, number

WARM_UP_STEPS = 150
EARLY_SHARE = 0.15  # of the time: easier problems
DECAY_FROM = 0.6  # of the time
COMPILE_STEPS = 3  # the clock starts after them


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=number(float, 0), default=1350, help="seconds")
    parser.add_argument("--max-steps", type=number(int, 1), default=10**9)
    parser.add_argument("--workers", type=number(int, 1), default=14, help="processes that make rows")
    parser.add_argument("--batch-tokens", type=number(int, 1), default=131072)
    parser.add_argument("--row", type=number(int, 1), default=4096, help="tokens per row")
    parser.add_argument("--long-row", type=number(int, 1), default=16384, help="tokens per row in the last stage")
    parser.add_argument("--long-from", type=number(float, 0, 1), default=0.78, help="share of the time at which the last stage starts")
    parser.add_argument("--layers", type=number(int, 1), default=10)
    parser.add_argument("--width", type=number(int, 1), default=512)
    parser.add_argument("--feed-forward", type=number(int, 1), default=1408)
    parser.add_argument("--heads", type=number(int, 1), default=4)
    parser.add_argument("--kv-heads", type=number(int, 1), default=2)
    parser.add_argument("--head-size", type=number(int, 1), default=128)
    parser.add_argument("--learning-rate", type=number(float, 0), default=2e-3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--attention", choices=("flex", "plain"), default="flex", help="plain does not mask documents: for trying things out"
    )
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--validation-problems", type=number(int, 1), default=32, help="per task and level")
    parser.add_argument("--validate-every", type=number(float, 0), default=120, help="seconds")
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=1)
    add_force(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    claim(args.out, ["final.npz", "ckpt.npz", "partial.npz", "validation.json"], args.force)

    from rows import EARLY, LONG, MAIN, Loader, RowMaker

    # The worker processes are forked here, before torch starts threads.
    loader = Loader(args.data, args.seed, args.workers, args.row, args.long_row, args.batch_tokens)
    maker = RowMaker(args.data, 999_983)

    import torch
    from network import DocumentMask, Geometry, Network
    from optimizer import Optimizer
    from validation import Validation

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    geometry = Geometry(
        maker.tokenizer.get_vocab_size(), args.layers, args.width, args.feed_forward, args.heads, args.kv_heads, args.head_size,
        args.long_row,
    )  # fmt: skip
    model = Network(geometry, dtype).to(args.device)
    log = Log(args.out / "log.txt")
    log(sum(p.numel() for p in model.parameters()), "parameters,", geometry, args.device, torch.__version__)

    loss_of = model.loss
    if not args.no_compile:
        torch._dynamo.config.recompile_limit = 64
        for block in model.blocks:
            block.compile(dynamic=False)
        loss_of = torch.compile(model.loss, dynamic=False)
    mask_of = DocumentMask(args.batch_tokens, args.device) if args.attention == "flex" else lambda document: None
    optimizer = Optimizer(model, args.learning_rate, args.device)

    def to_device(batch):
        tensors = [torch.from_numpy(part) for part in batch]
        if args.device == "cuda":
            tensors = [tensor.pin_memory().to(args.device, non_blocking=True) for tensor in tensors]
        tokens, targets, document, position = tensors
        return tokens, targets, position.long(), mask_of(document)

    validation = Validation(model, maker, to_device, args.batch_tokens, args.row, args.long_row, args.validation_problems)
    history = []

    def validate(tag: str, long: bool) -> None:
        prose, exact = validation.prose_loss(), validation.exact_share(long)
        log(f"validation {tag}: prose {prose:.4f} nats/token, exact {json.dumps(exact)}")
        history.append({"tag": tag, "seconds": log.seconds(), "prose": prose, "tasks": exact})
        (args.out / "validation.json").write_text(json.dumps(history))

    step, total, n_total = 0, torch.zeros((), device=args.device), 0
    start = last_validation = None
    while step < args.max_steps:
        if start is None and step == COMPILE_STEPS:
            start = last_validation = log.seconds()
        done = 0.0 if start is None else (log.seconds() - start) / max(1e-9, args.budget - start)
        if done >= 1:
            break
        stage = LONG if done >= args.long_from else MAIN if done >= EARLY_SHARE else EARLY
        if loader.stage != stage:
            loader.stage = stage
            log(f"stage {stage} from step {step}")
        tokens, targets, position, mask = to_device(loader.next())
        row_length = 0 if mask is not None else args.long_row if stage == LONG else args.row
        loss, cross_entropy = loss_of(model.hidden(tokens, position, mask, row_length), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step(learning_rate_factor(step, done))
        total, n_total, step = total + cross_entropy.detach(), n_total + 1, step + 1
        if step <= COMPILE_STEPS or step % 200 == 0:
            mean = float(total) / n_total
            log(f"step {step}, {step * args.batch_tokens / 1e6:.1f} M tokens, {done:.1%} of the time, loss {mean:.4f}")
            total, n_total = torch.zeros_like(total), 0
            if not math.isfinite(mean):
                raise SystemExit("the loss is not finite")
        if last_validation is not None and log.seconds() - last_validation > args.validate_every:
            last_validation = log.seconds()
            validate(f"step {step}", stage == LONG)
            save_weights(model, args.out / "ckpt.npz")
    save_weights(model, args.out / "final.npz")
    validate("final", True)
    loader.stop()
    log("done")


def learning_rate_factor(step: int, done: float) -> float:
    """Warm-up by steps, constant, then linear towards zero by the clock."""
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    decay = 1.0 if done < DECAY_FROM else max(0.0, (1 - done) / (1 - DECAY_FROM))
    return warm * (0.01 + 0.99 * decay)


def save_weights(model, path: Path) -> None:
    import numpy as np

    partial = path.with_name("partial.npz")
    np.savez(partial, **{name: weight.detach().float().cpu().numpy() for name, weight in model.named_parameters()})
    partial.replace(path)


class Log:
    def __init__(self, path: Path) -> None:
        self._begin, self._file = time.time(), path.open("a")

    def seconds(self) -> float:
        return time.time() - self._begin

    def __call__(self, *words: object) -> None:
        line = f"[{self.seconds():7.1f}] " + " ".join(map(str, words))
        print(line, flush=True)
        self._file.write(line + "\n")
        self._file.flush()


if __name__ == "__main__":
    main()
