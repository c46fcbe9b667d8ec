"""Networks: layers, direction getters and the architectures built from them."""
