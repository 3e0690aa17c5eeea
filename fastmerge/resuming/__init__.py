"""What a run that was stopped needs to go on: checkpoints, random states, requests to stop."""
