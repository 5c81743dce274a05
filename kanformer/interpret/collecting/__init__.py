"""One streaming pass over data, and what it leaves: dataclasses of tensors."""
