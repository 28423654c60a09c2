"""Does fine-tuning fit on this GPU, how fast is it, what does it do to the loss, and did that get worse?

A pytest-benchmark suite is the experiment. Data flows one way::

    Trial -> child process -> Outcome -> benchmark record -> report

Import from the modules: `lightweight.models`, `lightweight.methods`, `lightweight.targets`, `lightweight.corpus` say
what is trained, how, on what and with which tokens; `lightweight.trial` holds the nouns `Trial` and `Outcome`;
`lightweight.plugin` is what a `conftest.py` loads.
"""

__version__ = "0.1.0"
