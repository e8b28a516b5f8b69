from .audio_files import read_audio as read_audio, resample as resample
from .chat_messages import Messages as Messages
from .datamodule import SampleData as SampleData
from .images import (
    on_white as on_white,
    read_image as read_image,
    read_tensor as read_tensor,
    read_video as read_video,
    to_tensor as to_tensor,
)
from .llava import LlavaJson as LlavaJson
from .packed_inputs import PackedData as PackedData, write_packed as write_packed
from .samplers import ResumableLoader as ResumableLoader, ShardedOrder as ShardedOrder
from .samples import (
    IGNORED as IGNORED,
    RATE as RATE,
    Batch as Batch,
    ConcatSamples as ConcatSamples,
    MediaError as MediaError,
    MediaSamples as MediaSamples,
    Sample as Sample,
    Samples as Samples,
    Turn as Turn,
)
from .speech_manifests import Manifest as Manifest, json_lines as json_lines, need as need
from .splits import (
    SPLITS as SPLITS,
    Split as Split,
    check_split as check_split,
    split_of as split_of,
)
from .text_corpus import (
    CORPUS_SPLITS as CORPUS_SPLITS,
    CorpusData as CorpusData,
    file_split as file_split,
    find_files as find_files,
    read_text as read_text,
)
from .tokenizers import (
    HFTokenizer as HFTokenizer,
    SmolLM2Tokenizer as SmolLM2Tokenizer,
    Tokenizer as Tokenizer,
    WordTokenizer as WordTokenizer,
)
