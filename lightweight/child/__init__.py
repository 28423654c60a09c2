"""How does a trial run in a process of its own, and how is that process's end turned into an outcome?"""
