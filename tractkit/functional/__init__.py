"""Train any model on any batches: batch iterators, `TorchModel`, `train_model`."""
