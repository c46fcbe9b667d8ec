"""From the data file to a batch: datasets, samplers, augmentation, loaders."""
