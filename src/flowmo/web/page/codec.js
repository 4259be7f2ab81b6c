// The .flowmo file, packed form: docs/codec.md specifies every byte.
//
// `model` is model.json. Codes are {height, width, planes, ids}: ids is an Int32Array of tiles x tokens x sub-tokens,
// or at native size of cells x planes.

import { tileStarts } from "./layout.js";

const MAX_PIXELS = 16e6; // as for images: decoding takes some hundred bytes a pixel

export class CodecError extends Error {}

export function codesShape(model, height, width) {
  if (!model.native) return tileStarts(height, model.tile).length * tileStarts(width, model.tile).length * model.tokens;
  return Math.ceil(height / model.cell) * Math.ceil(width / model.cell);
}

export function packedSize(count, bits) {
  return Math.ceil((count * bits) / 8);
}

export function fileSize(model, codes, planes = codes.planes) {
  const tokens = codesShape(model, codes.height, codes.width);
  const numbers = varint(codes.height - 1).length + varint(codes.width - 1).length;
  if (!model.native) return 8 + numbers + varint(model.tile - 1).length + packedSize(tokens * planes, model.bits) + 4;
  return 8 + numbers + 1 + 2 + planes * (packedSize(tokens, model.bits) + 2);
}

export function pack(model, codes) {
  const { height, width, planes, ids } = codes;
  const version = model.native ? 3 : 2;
  const header = [0x46, 0x4c, 0x4d, version, ...hexBytes(model.identity), ...varint(height - 1), ...varint(width - 1)];
  if (!model.native) {
    header.push(...varint(model.tile - 1));
    const packed = packIds(ids, model.bits);
    const check = crc32(packed, crc32(Uint8Array.from(header)));
    return concatenate([header, packed, [check & 255, (check >>> 8) & 255, (check >>> 16) & 255, check >>> 24]]);
  }
  header.push(planes);
  let check = crc16(Uint8Array.from(header));
  const parts = [header, [check & 255, check >> 8]];
  for (let plane = 0; plane < planes; plane++) {
    const packed = packIds(ids.filter((_, i) => i % planes === plane), model.bits);
    check = crc16(packed, check);
    parts.push(packed, [check & 255, check >> 8]);
  }
  return concatenate(parts);
}

// Returns codes, and in `missing` the number of planes that a cut or damaged file lacks.
export function unpack(model, bytes) {
  if (bytes.length < 15 || String.fromCharCode(...bytes.subarray(0, 3)) !== "FLM") {
    throw new CodecError("This is not a .flowmo file.");
  }
  const version = bytes[3] & 15;
  const coding = bytes[3] >> 4;
  if (![2, 3].includes(version) || coding > 1) throw new CodecError("A later version of FlowMo wrote this file.");
  const identity = Array.from(bytes.subarray(4, 8), (b) => b.toString(16).padStart(2, "0")).join("");
  if (identity !== model.identity) {
    throw new CodecError(`Tokenizer ${identity} wrote this file. This page has ${model.name}, ${model.identity}.`);
  }
  if (coding) {
    throw new CodecError(
      "The file is entropy-coded, and this page reads packed files only. Make one of it: flowmo encode FILE packed.flowmo --packed --model MODEL.",
    );
  }
  if (version !== (model.native ? 3 : 2)) throw damaged("its version is not this tokenizer's");
  const reader = { bytes, position: 8 };
  const height = readVarint(reader) + 1;
  const width = readVarint(reader) + 1;
  if (height * width > MAX_PIXELS) throw tooLarge(width, height);
  const tokens = codesShape(model, height, width);
  if (tokens > 1 && (model.native ? tokens * model.cell ** 2 : (tokens / model.tokens) * model.tile ** 2) > 4 * MAX_PIXELS) {
    throw tooLarge(width, height);
  }
  const read = model.native ? readPlanes : readTiles;
  return { height, width, missing: 0, ...read(model, reader, tokens) };
}

function readTiles(model, reader, tokens) {
  if (readVarint(reader) + 1 !== model.tile) throw damaged("its tiles are not this tokenizer's");
  const header = reader.bytes.subarray(0, reader.position);
  const count = tokens * model.subTokens;
  const packed = take(reader, packedSize(count, model.bits));
  const stored = new DataView(Uint8Array.from(take(reader, 4)).buffer).getUint32(0, true);
  if (reader.position !== reader.bytes.length) throw damaged("its length does not match its header");
  if (stored !== crc32(packed, crc32(header))) throw damaged("its checksum does not match");
  return { planes: model.subTokens, ids: unpackIds(packed, count, model) };
}

function readPlanes(model, reader, tokens) {
  const total = take(reader, 1)[0];
  if (total < model.fewestSubTokens || total > model.subTokens) throw damaged("its planes are not this tokenizer's");
  let check = crc16(reader.bytes.subarray(0, reader.position));
  if (check !== readCrc16(reader)) throw damaged("the checksum of its header does not match");
  const planes = [];
  try {
    while (planes.length < total) {
      const packed = take(reader, packedSize(tokens, model.bits));
      check = crc16(packed, check);
      if (check !== readCrc16(reader)) throw damaged("the checksum of a plane does not match");
      planes.push(unpackIds(packed, tokens, model));
    }
    if (reader.position !== reader.bytes.length) throw damaged("bytes follow its last plane");
  } catch (error) {
    if (planes.length < model.fewestSubTokens || planes.length === total) throw error;
  }
  const ids = new Int32Array(tokens * planes.length);
  planes.forEach((plane, p) => plane.forEach((id, i) => (ids[i * planes.length + p] = id)));
  return { planes: planes.length, ids, missing: total - planes.length };
}

function tooLarge(width, height) {
  return new CodecError(
    `The image has ${width} × ${height} pixels, or so its header says. This page takes ${MAX_PIXELS / 1e6} million. Use flowmo decode.`,
  );
}

function damaged(reason) {
  return new CodecError(`The file is damaged: ${reason}.`);
}

function take(reader, count) {
  if (reader.position + count > reader.bytes.length) throw damaged("it ends early");
  reader.position += count;
  return reader.bytes.subarray(reader.position - count, reader.position);
}

function readCrc16(reader) {
  const [low, high] = take(reader, 2);
  return low | (high << 8);
}

function readVarint(reader) {
  let value = 0;
  for (let i = 0; i < 5; i++) {
    const byte = take(reader, 1)[0];
    value += (byte & 127) * 2 ** (7 * i);
    if (byte < 128 && (byte || !i)) return value;
    if (byte < 128) break;
  }
  throw damaged("a number in it does not end or is longer than necessary");
}

function varint(value) {
  const out = [];
  for (; value > 127; value = Math.floor(value / 128)) out.push((value & 127) | 128);
  return [...out, value];
}

function packIds(ids, bits) {
  const out = new Uint8Array(packedSize(ids.length, bits));
  let position = 0;
  for (const id of ids) {
    for (let bit = 0; bit < bits; bit++, position++) out[position >> 3] |= ((id >> bit) & 1) << (position & 7);
  }
  return out;
}

function unpackIds(packed, count, { bits, idCount }) {
  const ids = new Int32Array(count);
  for (let i = 0, position = 0; i < count; i++) {
    for (let bit = 0; bit < bits; bit++, position++) ids[i] |= ((packed[position >> 3] >> (position & 7)) & 1) << bit;
    if (ids[i] >= idCount) throw damaged("an id is too large");
  }
  return ids;
}

function hexBytes(text) {
  return text.match(/../g).map((pair) => parseInt(pair, 16));
}

function concatenate(parts) {
  const out = new Uint8Array(parts.reduce((total, part) => total + part.length, 0));
  parts.reduce((position, part) => (out.set(part, position), position + part.length), 0);
  return out;
}

function crc32(bytes, start = 0) {
  let check = ~start;
  for (const byte of bytes) {
    check ^= byte;
    for (let bit = 0; bit < 8; bit++) check = (check >>> 1) ^ (check & 1 ? 0xedb88320 : 0);
  }
  return ~check >>> 0;
}

function crc16(bytes, check = 0) {
  for (const byte of bytes) {
    check ^= byte << 8;
    for (let bit = 0; bit < 8; bit++) check = ((check << 1) ^ (check & 0x8000 ? 0x1021 : 0)) & 0xffff;
  }
  return check;
}
