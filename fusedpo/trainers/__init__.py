"""The losses inside trainers that people already use. Each needs an extra, none is imported."""
