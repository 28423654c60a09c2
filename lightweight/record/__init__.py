"""What does a stored run say? `record.load("run.json")` returns a `Run` of dataclasses: its trials, forecasts and
speedups.

The JSON has one entry per trial, beside pytest-benchmark's own rows in the same file. Reading it needs no torch.
"""

from lightweight.record.codec import FORECAST_KEYS as FORECAST_KEYS
from lightweight.record.codec import KEYS as KEYS
from lightweight.record.codec import as_json as as_json
from lightweight.record.codec import entry_of as entry_of
from lightweight.record.codec import forecast_of as forecast_of
from lightweight.record.entries import BASELINE as BASELINE
from lightweight.record.entries import INTERRUPTED as INTERRUPTED
from lightweight.record.entries import ONE_AFTER_THE_OTHER as ONE_AFTER_THE_OTHER
from lightweight.record.entries import Entry as Entry
from lightweight.record.entries import ForecastRow as ForecastRow
from lightweight.record.entries import NoForecast as NoForecast
from lightweight.record.entries import Run as Run
from lightweight.record.entries import Speedup as Speedup
from lightweight.record.entries import seconds_per_token as seconds_per_token
from lightweight.record.entries import training_loss as training_loss
from lightweight.record.likeness import OF_METHOD as OF_METHOD
from lightweight.record.likeness import SAME_BASELINE as SAME_BASELINE
from lightweight.record.likeness import SAME_BUT_RANKS as SAME_BUT_RANKS
from lightweight.record.likeness import SAME_BUT_SCALE as SAME_BUT_SCALE
from lightweight.record.likeness import SAME_CELL as SAME_CELL
from lightweight.record.likeness import SAME_METHOD as SAME_METHOD
from lightweight.record.likeness import SAME_TRIAL as SAME_TRIAL
from lightweight.record.likeness import SAME_WEIGHTS as SAME_WEIGHTS
from lightweight.record.likeness import Likeness as Likeness
from lightweight.record.likeness import arguments_told as arguments_told
from lightweight.record.likeness import baseline_of as baseline_of
from lightweight.record.likeness import differing_settings as differing_settings
from lightweight.record.reading import RecordError as RecordError
from lightweight.record.reading import load as load
from lightweight.record.reading import run as run
from lightweight.record.searched import check_searched as check_searched
from lightweight.record.shown import one_line as one_line
from lightweight.record.shown import readable as readable
from lightweight.record.writing import DISTRIBUTION as DISTRIBUTION
from lightweight.record.writing import SCHEMA as SCHEMA
from lightweight.record.writing import document as document
from lightweight.record.writing import entry as entry
from lightweight.record.writing import forecast_row as forecast_row
from lightweight.record.writing import method_digest as method_digest
from lightweight.record.writing import said_of as said_of
from lightweight.record.writing import settings as settings
from lightweight.record.writing import steady_seconds_per_token as steady_seconds_per_token
from lightweight.record.writing import steady_step_seconds as steady_step_seconds
from lightweight.record.writing import versions as versions
from lightweight.record.writing import versions_of as versions_of
