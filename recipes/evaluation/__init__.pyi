from .linformer import Linformer as Linformer
