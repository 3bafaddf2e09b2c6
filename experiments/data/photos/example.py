"""Packs an image file, its label and its name as `tf.train.Example`, the record that TFDS writes, without TensorFlow.

The message is declared here from its published definition, for the protobuf library:
https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/example/feature.proto
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

LISTS = {"BytesList": "TYPE_BYTES", "FloatList": "TYPE_FLOAT", "Int64List": "TYPE_INT64"}
FIELDS = {"bytes_list": "BytesList", "float_list": "FloatList", "int64_list": "Int64List"}
Field = descriptor_pb2.FieldDescriptorProto


def _declared() -> type[Any]:
    """Returns the class of the message Example."""
    file = descriptor_pb2.FileDescriptorProto(name="bnjax/example.proto", package="bnjax", syntax="proto3")

    def add(parent: Any, name: str, number: int, kind: str, of: str = "", repeated: bool = False) -> None:
        label = Field.LABEL_REPEATED if repeated else Field.LABEL_OPTIONAL
        parent.field.add(name=name, number=number, type=getattr(Field, kind), label=label, type_name=of or None)

    for name, kind in LISTS.items():
        add(file.message_type.add(name=name), "value", 1, kind, repeated=True)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, of) in enumerate(FIELDS.items(), start=1):
        add(feature, name, number, "TYPE_MESSAGE", f".bnjax.{of}")
        feature.field[-1].oneof_index = 0
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")  # a map is a repeated message of keys and values
    entry.options.map_entry = True
    add(entry, "key", 1, "TYPE_STRING")
    add(entry, "value", 2, "TYPE_MESSAGE", ".bnjax.Feature")
    add(features, "feature", 1, "TYPE_MESSAGE", ".bnjax.Features.FeatureEntry", repeated=True)
    add(file.message_type.add(name="Example"), "features", 1, "TYPE_MESSAGE", ".bnjax.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("bnjax.Example"))


Example = _declared()


def pack(image: bytes, label: int, name: str) -> bytes:
    """Returns a record that holds an image file, its label and its name."""
    example = Example()
    example.features.feature["image"].bytes_list.value.append(image)
    example.features.feature["label"].int64_list.value.append(label)
    example.features.feature["file_name"].bytes_list.value.append(name.encode())
    return example.SerializeToString(deterministic=True)


def unpack(record: bytes) -> tuple[bytes, int, str]:
    """Returns image file, label and name of a record; the name is empty if the record has none.

    Raises:
        ValueError: the record is no Example, or one without image and label.
    """
    try:
        features = Example.FromString(record).features.feature
    except DecodeError as error:
        raise ValueError("no tf.train.Example") from error
    found = {name: features[name] for name in features}
    try:
        image, label = found["image"].bytes_list.value[0], found["label"].int64_list.value[0]
    except (KeyError, IndexError) as error:
        raise ValueError(f"expected the features image and label, found {sorted(found)}") from error
    names = found["file_name"].bytes_list.value if "file_name" in found else ()
    return image, label, names[0].decode(errors="replace") if names else ""
