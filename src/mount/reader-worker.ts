/**
 * The thread that reads the kernel's requests. It waits in poll(2), which the main thread must never do, and hands over what it read: one
 * array of bytes with requests one behind the other, each of which begins with its length.
 */
import { parentPort, workerData, type MessagePort } from 'node:worker_threads';

import type { LoadedMessage } from '../workers.js';
import { loadNative, readRequest, waitReadable } from './native.js';
import { REQUEST_BUFFER_BYTES } from './protocol.js';

/** What the thread is started with; undefined: that comes as its first message. */
export interface ReaderData {
  readonly b2Reader: true;
  readonly start: ReaderStart | undefined;
}

export interface ReaderStart {
  /** /dev/fuse, non-blocking. */
  readonly fuseFd: number;
  /** Readable: stop. */
  readonly wakeFd: number;
  /** One Int32: requests handed over and not yet done. */
  readonly pending: SharedArrayBuffer;
  readonly maxPending: number;
}

/** What it says. After `end` it says nothing more. */
export type ReaderMessage =
  | LoadedMessage
  | { readonly type: 'requests'; readonly bytes: Uint8Array }
  | { readonly type: 'end'; readonly why: 'unmounted' | 'stopped' };

/** Requests handed over in one message at most. */
const BATCH = 32;

function isReader(data: unknown): data is ReaderData {
  return typeof data === 'object' && data !== null && 'b2Reader' in data;
}

function serve(start: ReaderStart, post: (message: ReaderMessage) => void): void {
  const { fuseFd, wakeFd } = start;
  const pending = new Int32Array(start.pending);
  const buffer = new Uint8Array(REQUEST_BUFFER_BYTES * BATCH);
  for (;;) {
    let used = 0;
    let count = 0;
    let isGone = false;
    while (count < BATCH) {
      const got = readRequest(fuseFd, buffer.subarray(used, used + REQUEST_BUFFER_BYTES));
      if (got === undefined) isGone = true;
      if (got === undefined || got === 0) break;
      used += got;
      count++;
    }
    if (count > 0) {
      Atomics.add(pending, 0, count);
      post({ type: 'requests', bytes: buffer.slice(0, used) });
    }
    if (isGone) return post({ type: 'end', why: 'unmounted' });
    // What is not taken stays in the kernel, and whoever asked waits there: memory here is bounded.
    for (
      let now = Atomics.load(pending, 0);
      now >= start.maxPending;
      now = Atomics.load(pending, 0)
    ) {
      Atomics.wait(pending, 0, now, 1000);
    }
    if (count < BATCH) {
      const [, isWoken] = waitReadable([fuseFd, wakeFd]);
      if (isWoken === true) return post({ type: 'end', why: 'stopped' });
    }
  }
}

function begin(start: ReaderStart, port: MessagePort): void {
  serve(start, (message) => port.postMessage(message));
}

if (isReader(workerData) && parentPort !== null) {
  const port = parentPort;
  const { start } = workerData;
  if (start !== undefined) begin(start, port);
  else {
    port.once('message', (late: ReaderStart) => begin(late, port));
    loadNative();
    const loaded: LoadedMessage = { type: 'loaded' };
    port.postMessage(loaded);
  }
}
