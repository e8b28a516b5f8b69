from .vision import TimmVision as TimmVision
