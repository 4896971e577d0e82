"""A run on several devices: its processes, what they tell each other, and what happens when one of them is lost."""
