"""The main job on a real checkpoint: patch, compare, shrink, distil, look, save, load, verify."""
