"""llama.cpp itself runs what we export: python tests/hf/check_llama_cpp.py

Needs llama-cpp-python (pip builds it in about 6 minutes), so it is no part of `make test`.  Trains a small ternary
Llama on the Python documentation, exports it, and compares logits, greedy tokens and tokens with llama.cpp's; exits
with 1 if a bar is missed, or if the check does not notice that the rows of q and k keep their order.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from unittest.mock import patch

import numpy as np
import torch
from models import FALCON_E, byte_tokenizer, distance, logits

from onebit_ext.hf import export_gguf, save_pretrained
from onebit_ext.hf import gguf as gguf_module
from onebit_ext.torch import FlipOptimizer, replace_linear

try:
    from llama_cpp import Llama
except ImportError:
    Llama = None

STEPS, BATCH, LENGTH, POSITIONS = 400, 8, 128, 200
BARS = {"rms": 0.02, "agreement": 0.95}  # rms over the standard deviation of the logits; share of greedy tokens


def trained(text: torch.Tensor) -> torch.nn.Module:
    """A ternary Llama of 4 blocks after STEPS steps on the tokens."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    fields = {
        key: value for key, value in FALCON_E.items() if key not in ("torch_dtype", "architectures", "model_type")
    }
    config = LlamaConfig(**fields | {"num_hidden_layers": 4, "rope_theta": 10000.0})
    model = replace_linear(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    optimizer = FlipOptimizer(model, recipe="pretrain", float_lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    rng = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=rng)
        batch = torch.stack([text[start : start + LENGTH] for start in starts])
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"  step {step:4}  loss {loss.item():.3f}", flush=True)
    return model.eval()


def llama_logits(path: Path, ids: list[int], text: str) -> torch.Tensor:
    """llama.cpp's logits (M, vocabulary); its tokens of the text must be `ids`."""
    llama = Llama(str(path), n_ctx=POSITIONS + 8, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1)
    assert llama.tokenize(text.encode(), add_bos=False) == ids, "llama.cpp tokenises the text differently"
    llama.eval(ids)
    scores = torch.from_numpy(np.array(llama.scores[: len(ids)]))
    llama.close()
    return scores


def main() -> int:
    if Llama is None:
        print("needs llama-cpp-python: pip install llama-cpp-python", file=sys.stderr)
        return 2

    tokenizer = byte_tokenizer()
    text = "".join(topics[key] for key in sorted(topics) if key != "lambda").encode("ascii", "ignore").decode()
    held_out = topics["lambda"].encode("ascii", "ignore").decode()[:POSITIONS]
    model = trained(torch.tensor(tokenizer(text)["input_ids"]))
    ids = tokenizer(held_out)["input_ids"]
    want = logits(model, torch.tensor([ids]))[0]
    missed = False
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_pretrained(model, folder / "hf", tokenizer=tokenizer)
        for to, dropped in (("gguf-tq2_0", False), ("gguf-tq1_0", False), ("gguf-tq2_0", True)):
            path = folder / f"{to}-{dropped}.gguf"
            order = (lambda *_: slice(None)) if dropped else gguf_module._row_order
            with patch.object(gguf_module, "_row_order", order):
                export_gguf(folder / "hf", path, to)
            got = llama_logits(path, ids, held_out)
            rms = distance(got, want)
            agreement = float((got.argmax(1) == want.argmax(1)).float().mean())
            passed = rms <= BARS["rms"] and agreement >= BARS["agreement"]
            missed |= passed is dropped
            note = "  (q/k rows not reordered: must fail)" if dropped else ""
            print(
                f"{to}: rms {100 * rms:.2f} % of std, greedy tokens agree {100 * agreement:.1f} % of {len(ids)}{note}"
            )
    return int(missed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
