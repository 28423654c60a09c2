"""How does pytest run the trials: options, collection, xdist, progress, the gate at the end?"""
