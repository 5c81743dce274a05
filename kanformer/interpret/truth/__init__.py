"""What really happens to the loss when learned functions are held at their means, and how well the scores say so."""
