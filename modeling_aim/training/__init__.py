"""Training of projectors: `aim train`, or `train(TrainSettings(backbone=..., data=(...), output=...))`."""

from .episodes import Episode, Mixture, ShotLaw, Source
from .kept_states import KeptStates
from .run import train
from .settings import TrainSettings
from .sources import open_source
from .stream import EpisodeStream
from .targets import EpisodeCollator
from .trainer import AimTrainer, NotFinite

__all__ = [
    "AimTrainer",
    "Episode",
    "EpisodeCollator",
    "EpisodeStream",
    "KeptStates",
    "Mixture",
    "NotFinite",
    "ShotLaw",
    "Source",
    "TrainSettings",
    "open_source",
    "train",
]
