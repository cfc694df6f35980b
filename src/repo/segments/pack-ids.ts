/** Pack id pages as strings that are shared by everything that names the same pack. */
import { PACK_ID_BYTES } from '../../format/segment.js';

export interface PackIdPage {
  /** 32 hex digits each. */
  readonly ids: readonly string[];
}

/** Heap bytes of an id: a string of 32 one-byte characters and its place in the array. */
const ID_HEAP_BYTES = 64;

/** The ids in the plain body of a page, and what they occupy in memory. */
export function packIdStrings(plain: Buffer): { value: PackIdPage; bytes: number } {
  const ids: string[] = [];
  for (let at = 0; at < plain.length; at += PACK_ID_BYTES) {
    ids.push(plain.toString('hex', at, at + PACK_ID_BYTES));
  }
  return { value: { ids }, bytes: ids.length * ID_HEAP_BYTES };
}
