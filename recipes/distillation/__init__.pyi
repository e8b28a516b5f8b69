from .distiller import DistillationConfig as DistillationConfig
from .joint import OwnScorers as OwnScorers
from .joint import fresh as fresh
from .joint import train_jointly as train_jointly
