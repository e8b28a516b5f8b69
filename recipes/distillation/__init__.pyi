from .distiller import DistillationConfig as DistillationConfig
from .joint import OwnScorers as OwnScorers, fresh as fresh, train_jointly as train_jointly
