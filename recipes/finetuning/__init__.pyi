from .answer_tokens import find_answers as find_answers
from .chat_collator import ChatCollator as ChatCollator
from .chat_data import ChatData as ChatData
from .chat_templates import (
    check_template as check_template,
    encode as encode,
    sampling_rate as sampling_rate,
)
from .checkpoint_folders import (
    language_part as language_part,
    load_model as load_model,
    load_processor as load_processor,
)
from .checkpoint_model import CheckpointModel as CheckpointModel
from .conversations import message_of as message_of, messages_of as messages_of
from .mistral_requests import check_package as check_package
from .packing import check_packs as check_packs, pack_rows as pack_rows
