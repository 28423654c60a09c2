"""What does a job of the Trainer do: its rows and steps, its measurements, its ranks?"""
