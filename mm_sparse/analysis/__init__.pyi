from .html_page import (
    AudioView as AudioView,
    ImageView as ImageView,
    InspectionSample as InspectionSample,
    draw_sample as draw_sample,
    write_page as write_page,
)
from .layer_report import Report as Report, report as report
from .overlays import (
    kept_frames as kept_frames,
    kept_patches as kept_patches,
    kept_share as kept_share,
    save as save,
)
