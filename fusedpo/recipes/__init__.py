"""The data half of a method: where preference pairs come from."""
