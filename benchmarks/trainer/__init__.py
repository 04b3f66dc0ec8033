"""A zeroth-order Trainer beside Trainer's own fine-tuning: memory and time of a step."""
