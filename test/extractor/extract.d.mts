/** Types of what the extractor exports for its tests; the program itself is plain JavaScript. */
export class ExtractError extends Error {}
export function crc32(bytes: Uint8Array): number;
export function blake3Keyed(key: Uint8Array, data: Uint8Array): Buffer;
export function lz4Decode(input: Uint8Array, plainLength: number): Buffer;
export function parseYaml(source: string): unknown;
export interface Point {
  seq: number;
  first: number;
  class: string;
  merged: boolean;
  sizeBytes: number;
  epoch: number;
  hash: string;
}
export interface Listing {
  repository: { id: string; encryption: string; chunkBytes: number; created: string };
  volumes: {
    id: string;
    name: string | null;
    commits: number;
    tip: Point | null;
    points: Point[];
    snapshots: { name: string; seq: number; hash: string }[];
  }[];
}
export class Repository {
  constructor(root: string, secrets: { password?: string; keyMaterial?: Buffer });
  /** Closes the packs that are open. */
  close(): void;
}
export function list(repo: Repository, packsOnly: boolean): Listing;
export function extract(
  repo: Repository,
  packsOnly: boolean,
  volume: string,
  seq: string,
  outFile: string,
  snapshot: string | null,
): Point & { volume: string };
