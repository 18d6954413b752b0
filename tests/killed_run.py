"""A small training run with everything that a resume must restore, for test_train.py to kill: `killed_run.py DIR KIND`.

Prints a line after each step, and at its end a digest of the weights, the optimizer's state and the history.
"""

import hashlib
import sys

from minipeft import FullThenLoraConfig, LoraConfig, Tensor, fit, get_peft_model, nn, optim

# Before NumPy, as the tests import it: the first of them decides OpenBLAS's kernel, and with it the bits.
# isort: split
import numpy as np

STEPS = 300


def build(kind):
    """(model, optimizer, scheduler): dropout in the base and on the adapter's path, a trained copy, a schedule."""
    rng = np.random.default_rng(0)
    base = nn.Sequential(nn.Linear(12, 16, rng=rng), nn.ReLU(), nn.Dropout(0.2, rng=1), nn.Linear(16, 4, rng=rng))
    options = {"r": 2, "lora_dropout": 0.3, "modules_to_save": ["3"]}
    config = (
        FullThenLoraConfig(**options) if kind == "full-then-lora" else LoraConfig(init_lora_weights="pissa", **options)
    )
    model = get_peft_model(base, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    if kind == "sgd":
        optimizer = optim.SGD(trained, lr=0.05, momentum=0.9, nesterov=True)
    else:
        optimizer = optim.AdamW(trained, lr=0.01, amsgrad=True)
    return model, optimizer, optim.get_cosine_schedule_with_warmup(optimizer, 10, STEPS)


def batch(number):
    """The same batch for the same number."""
    rng = np.random.default_rng(number)
    x = rng.standard_normal((8, 12)).astype("float32")
    return Tensor(x), (x[:, :4].argmax(axis=1)).astype("int64")


def digest(model, optimizer, history):
    """One line that differs where any bit does."""
    sha = hashlib.sha256()
    for name, array in [*model.state_dict().items(), *optimizer.state_dict().items()]:
        sha.update(name.encode() + np.ascontiguousarray(array).tobytes())
    sha.update(np.array([history.loss, history.lr, history.grad_norm]).tobytes())
    return f"{sha.hexdigest()} {len(history.loss)}"


def main(directory, kind):
    """The run, from its last checkpoint if there is one."""
    model, optimizer, scheduler = build(kind)

    def tell(progress):
        print(progress.step, flush=True)

    history = fit(
        model, batch, steps=STEPS, optimizer=optimizer, scheduler=scheduler, clip_norm=0.5, grad_accumulation=2,
        checkpoint_dir=directory, checkpoint_every=1, resume=True, progress=False, callbacks=[tell],
    )  # fmt: skip
    print(digest(model, optimizer, history), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
