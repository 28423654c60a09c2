"""How is an optimizer step captured as a CUDA graph, and is it the Trainer's step?"""
