/** A target in memory that notes every write, and fails where a test wants it to. */
import type { DeviceFacts, WriteDevice } from '../../src/devices/device.js';
import { B2Error } from '../../src/errors.js';

export interface MemoryDevice extends WriteDevice {
  readonly bytes: Buffer;
  readonly writes: { readonly offset: number; readonly length: number }[];
  readonly zeros: { readonly offset: number; readonly length: number }[];
  reads: number;
  syncs: number;
  /** Called before each request; throws to make it fail. */
  before: (what: 'read' | 'write' | 'zero' | 'sync', offset: number) => void;
  /** Bytes are kept wrongly from here on: a lying disk. */
  corrupt: ((data: Buffer, offset: number) => void) | undefined;
}

export function memoryDevice(bytes: Buffer): MemoryDevice {
  const facts: DeviceFacts = {
    path: '/dev/test',
    realPath: '/dev/test',
    kind: 'block',
    sizeBytes: bytes.length,
    logicalBlockBytes: 512,
    physicalBlockBytes: 4096,
    readOnly: false,
    devNumber: undefined,
    partitionOf: undefined,
    identity: {},
    diskSequence: undefined,
  };
  const inside = (offset: number, length: number): void => {
    if (offset >= 0 && offset + length <= bytes.length) return;
    throw new B2Error('no-space', `${offset} + ${length} is not inside the device`);
  };
  const device: MemoryDevice = {
    facts,
    bytes,
    writes: [],
    zeros: [],
    reads: 0,
    syncs: 0,
    before: () => undefined,
    corrupt: undefined,
    async read(into, offset) {
      await Promise.resolve();
      device.before('read', offset);
      device.reads++;
      return bytes.copy(into, 0, offset, Math.min(bytes.length, offset + into.byteLength));
    },
    async write(data, offset) {
      device.before('write', offset);
      inside(offset, data.byteLength);
      device.writes.push({ offset, length: data.byteLength });
      await new Promise((resolve) => setImmediate(resolve));
      bytes.set(data, offset);
      device.corrupt?.(bytes, offset);
    },
    async zero(offset, length) {
      await Promise.resolve();
      device.before('zero', offset);
      inside(offset, length);
      device.zeros.push({ offset, length });
      bytes.fill(0, offset, offset + length);
    },
    truncate: () => Promise.reject(new Error('not asked for')),
    sync() {
      device.before('sync', 0);
      device.syncs++;
      return Promise.resolve();
    },
    close: () => Promise.resolve(),
  };
  return device;
}
