"""Makes objects.pkl.gz beside it: what people pickle and `torch.save`, as the version before the redraw wrote it.

It was run once, with commit 1ac7f91, as make.py says: PYTHONPATH=/tmp/before python make_objects.py
"""

import gzip
import io
import pickle
from pathlib import Path

import numpy as np
import torch

import tractkit as tk


def saved(value: object) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


lines = [np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((3, 3), np.float32)]
model = tk.Learn2Track(2, rnn_layer_sizes=[3], dropout=0.1, dg_dropout=0.1)
values = {
    "Volume": tk.Volume(np.arange(8, dtype=np.float32).reshape(2, 2, 2), np.diag([2.0, 2.0, 2.0, 1.0])),
    "Streamlines": tk.Streamlines.from_list(lines),
    "PhantomSettings": tk.PhantomSettings(snr=7),
    "Constant": tk.Constant(0.5),
    "Exponential": tk.Exponential(1.0, 0.5),
    "Space": tk.Space.VOX,
    "Trainer": tk.Trainer,
    "apply_affine": tk.apply_affine,
}
step = model.eval().step(torch.ones(1, 2), torch.tensor([[1.0, 0.0, 0.0]]), model.init_state(1))[0]
files = {name: pickle.dumps(value) for name, value in values.items()}
files |= {"Learn2Track": saved(model), "a step of it": step.detach().numpy().tobytes()}
(Path(__file__).parent / "objects.pkl.gz").write_bytes(gzip.compress(pickle.dumps(files), 9, mtime=0))
