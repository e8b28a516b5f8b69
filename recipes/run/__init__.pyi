from .generate_command import device_of as device_of, load_processor as load_processor
from .inspection import inspection_sample as inspection_sample
from .language_options import (
    add_options as add_options,
    changes_of as changes_of,
    prepared as prepared,
)
from .lightning_cli import main as main
from .settings_cli import (
    SettingsCLI as SettingsCLI,
    SettingsError as SettingsError,
    program as program,
)
from .shared_prompts import (
    is_first as is_first,
    join_processes as join_processes,
    leave_processes as leave_processes,
    processes as processes,
)
from .sparse_vs_dense import (
    RUNS as RUNS,
    on_device as on_device,
    prepare as prepare,
    validation_of as validation_of,
)
