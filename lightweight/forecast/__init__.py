"""Will it fit, before anything is trained? The step is traced without a GPU and its allocations replayed."""
