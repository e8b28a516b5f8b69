from .html_page import (
    AudioView as AudioView,
)
from .html_page import (
    ImageView as ImageView,
)
from .html_page import (
    InspectionSample as InspectionSample,
)
from .html_page import (
    draw_scene as draw_scene,
)
from .html_page import (
    write_page as write_page,
)
from .layer_report import Report as Report
from .layer_report import report as report
from .overlays import (
    kept_frames as kept_frames,
)
from .overlays import (
    kept_patches as kept_patches,
)
from .overlays import (
    kept_share as kept_share,
)
from .overlays import (
    save as save,
)
