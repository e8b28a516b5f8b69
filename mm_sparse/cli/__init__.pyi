from .arguments import positive as positive, share as share
