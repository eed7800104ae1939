"""What is stored: safetensors and torch zip files as named byte ranges. Nothing is unpickled into live objects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .adapters import (
        ADAPTER_WEIGHTS,
        Adapter,
        AdapterDescription,
        adapter_weights,
        describe_adapter,
        open_adapter,
        require_tensors,
    )
    from .arrivals import Uses, encode_torch_head, read_head
    from .bytesource import ByteSource, FileSource
    from .choosing import (
        ADAPTER_CONFIG,
        NO_PART,
        NO_WEIGHTS,
        WeightSet,
        check_named,
        choose_weights,
        is_index,
        is_module,
        is_of_tokenizer,
        is_part,
        is_template,
        no_weights,
        refuse_adapter,
        tokenizer_files,
        variants,
    )
    from .contents import check_weight_map, join_contents, read_contents
    from .files import (
        MAX_CONFIG,
        MAX_INDEX,
        FileFormat,
        check_fetched,
        check_file,
        file_format_of,
        find_weight_files,
        parse_object,
        read_json,
        read_json_list,
    )
    from .headers import encode_header, layout_key, read_header
    from .mapped import MappedFiles, overflows
    from .naming import Matches, TensorRecipe, exempt, match
    from .tensors import (
        CASTABLE,
        DECODED,
        FETCH_AGAIN,
        OUR_LIMIT,
        SAFETENSORS_NAMES,
        STORAGE_CLASSES,
        Contents,
        Decoder,
        Made,
        TensorInfo,
        Tensors,
        beyond,
        dtype_name,
        find_aliases,
        invalid,
        itemsize,
        reaches,
        tensor_nbytes,
    )
    from .view import (
        ARCHITECTURE_FILE,
        CHUNK,
        Checkpoint,
        ModelDescription,
        OpenFiles,
        describe_checkpoint,
        describe_if_single,
        describe_opened,
        open_checkpoint,
    )
    from .zipfiles import END, END64, ENTRY, LOCAL, LOCATOR64

__getattr__, __all__ = face(__name__)
