"""What computes: the verbs by kind of array, H, and the arithmetic between them."""
