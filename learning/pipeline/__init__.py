"""Models larger than one peer: stages, their schedule and flow, and recovery without checkpoints."""
