"""What does a command of `lightweight` do besides reading records: train, save, chat, write a model card?"""
