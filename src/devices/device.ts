/**
 * Devices: what is captured from and restored to. A block device, a partition or an image file.
 *
 * Contract for every implementation (test/support/device-suite.ts checks it). Offsets and lengths are bytes.
 * Errors are {@link B2Error} that name the device, the offset and the length.
 */

/** Facts about a device that do not change while it is open, except `sizeBytes` (see {@link Device.refresh}). */
export interface DeviceFacts {
  /** As the user named it. */
  readonly path: string;
  /** Canonical path (symbolic links such as /dev/disk/by-id/… resolved). */
  readonly realPath: string;
  readonly kind: 'block' | 'file';
  readonly sizeBytes: number;
  /** 512 or 4096 for a block device; 512 for a file. */
  readonly logicalBlockBytes: number;
  readonly physicalBlockBytes: number;
  readonly readOnly: boolean;
  /** `major:minor` of a block device. */
  readonly devNumber: string | undefined;
  /** For a partition: the whole disk it lies on and its offset there. */
  readonly partitionOf: { readonly diskPath: string; readonly offsetBytes: number } | undefined;
  /** Stable identity where there is one: serial, WWN, dm uuid, loop backing file, partition UUID, inode of a file. */
  readonly identity: Readonly<Record<string, string>>;
  /** `/sys/class/block/X/diskseq`: changes whenever the medium behind the node does. */
  readonly diskSequence: bigint | undefined;
}

/** A run of bytes that is known to read as zeros without being read. */
export interface ByteRange {
  readonly offset: number;
  readonly length: number;
}

/** One of several reads: fills `into` from `offset`. */
export interface RangeRead {
  readonly into: Uint8Array;
  readonly offset: number;
}

/** Deep enough to be cheap, and no burst that whoever else uses the device would notice. */
export const READS_AT_ONCE = 16;

/** A device open for reading. */
export interface ReadDevice {
  readonly facts: DeviceFacts;
  /**
   * Fills `into` from `offset`; resolves to the bytes read, less than `into.byteLength` only at the end of the
   * device. Reads what is on the medium, not what a page cache held earlier: block devices are read with O_DIRECT
   * through a page-aligned bounce buffer unless `into` is itself page-aligned (see `alignedMemory`) and `offset` and
   * length are multiples of 4096.
   */
  read(into: Uint8Array, offset: number): Promise<number>;
  /**
   * Reads many small ranges for much less than a `read` of each costs; up to {@link READS_AT_ONCE}. Resolves, when all are over,
   * to whether each was read in full. What was not is to be read by `read`, which says why it cannot be; so that a device
   * without this, or one that cannot do it at the moment, only costs more.
   */
  readMany?(reads: readonly RangeRead[]): Promise<readonly boolean[]>;
  /**
   * The parts of [offset, offset+length) that hold data, ascending, not overlapping; the rest is known to be zeros
   * (holes of a file: SEEK_DATA). A device that cannot tell returns the whole range. Never omits data.
   */
  dataRanges(offset: number, length: number): Promise<readonly ByteRange[]>;
  /** Reads the size and identity again. */
  refresh(): Promise<DeviceFacts>;
  close(): Promise<void>;
}

/** A device open for writing, as a target of restore. */
export interface WriteDevice {
  readonly facts: DeviceFacts;
  /** Reads back what is there (from the medium, as {@link ReadDevice.read}). */
  read(into: Uint8Array, offset: number): Promise<number>;
  /** Writes all of `data` at `offset`. Not durable before `sync`. */
  write(data: Uint8Array, offset: number): Promise<void>;
  /**
   * Makes the range read as zeros, by the cheapest way that guarantees it (hole punch on a file, BLKZEROOUT or
   * write-zeroes on a device, zero writes otherwise). When it resolves nothing of the old data is readable there.
   */
  zero(offset: number, length: number): Promise<void>;
  /** File: sets its length. Block device: rejects unless `sizeBytes` is its size. */
  truncate(sizeBytes: number): Promise<void>;
  /** Everything written is durable. */
  sync(): Promise<void>;
  close(): Promise<void>;
}
