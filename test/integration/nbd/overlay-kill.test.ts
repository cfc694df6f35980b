/** A server that is killed with SIGKILL while clients write: what was flushed is there, and serving goes on. */
import { spawn, type ChildProcess } from 'node:child_process';
import { rmSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { compileForChild } from '../../support/compile.js';
import { patternBytes } from '../../support/image-memory.js';
import { NbdTestClient, requestBytes } from '../../support/nbd-client.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

const MIB = 1024 * 1024;
const SIZE = 16 * MIB;
const SLOT = 64 * 1024;
const KILLS = 40;

/** Serves an overlay over a base that reads as 0x5a everywhere. */
const SERVER = `
const { serveNbd, openOverlay } = await import(process.argv[1]);
const [socketPath, path] = process.argv.slice(2);
const base = {
  sizeBytes: ${SIZE}, logicalBlockBytes: 512,
  read: async (into) => void into.fill(0x5a),
  extents: async (offset, length) => [{ offset, length, hole: false }],
  close: async () => {},
};
const identity = { repository: 'aa', volume: 'bb', seq: 1, hash: 'cc' };
const image = await openOverlay({ path, base, identity });
await serveNbd({ exports: [{ name: '', open: async () => image }], listen: { socketPath }, events: (e) => console.error(JSON.stringify(e)) });
process.stdout.write('ready\\n');
`;

let directory: TempDir;
let compiled: string;

beforeAll(() => {
  directory = tempDir();
  compiled = compileForChild('nbd/index.ts');
});

afterAll(async () => {
  rmSync(compiled, { recursive: true });
  await directory.remove();
});

async function serve(): Promise<ChildProcess> {
  // Whatever becomes of the test, the server goes with the directory.
  const child = spawn(
    process.execPath,
    [
      '--input-type=module',
      '-e',
      SERVER,
      join(compiled, 'nbd/index.js'),
      directory.join('sock'),
      directory.join('overlay'),
    ],
    { stdio: ['ignore', 'pipe', 'inherit'] },
  );
  directory.onRemove(() => void child.kill('SIGKILL'));
  await new Promise<void>((done, reject) => {
    child.stdout?.once('data', () => done());
    child.once('exit', (code) => reject(new Error(`the server ended with ${code}`)));
  });
  return child;
}

describe('kill -9 of the server', () => {
  it('loses nothing that was flushed', async () => {
    // For each slot the seed of what was flushed, and of what was sent since.
    const flushed = new Map<number, number>();
    const sent = new Map<number, number[]>();
    let seed = 1;
    let flushes = 0;
    for (let round = 0; round < KILLS; round++) {
      const child = await serve();
      const exited = new Promise<void>((done) => child.once('exit', () => done()));
      const path = directory.join('sock');
      const client = await NbdTestClient.go(path);
      for (const slot of new Set([...flushed.keys(), ...sent.keys()])) {
        const seen = await client.read(slot * SLOT, SLOT);
        const old = flushed.get(slot);
        const choices = (sent.get(slot) ?? []).map((choice) => patternBytes(SLOT, choice));
        choices.push(old === undefined ? Buffer.alloc(SLOT, 0x5a) : patternBytes(SLOT, old));
        if (choices.some((choice) => choice.equals(seen))) continue;
        for (let at = 0; at < SLOT; at += 512) {
          const sector = seen.subarray(at, at + 512);
          const known = choices.some((choice) => sector.equals(choice.subarray(at, at + 512)));
          if (!known)
            throw new Error(`round ${round}: slot ${slot} at ${at} is neither old nor new`);
        }
      }
      // What survived unflushed may still be lost, so both remain possible until the next flush overwrites them.
      // After one to three flushes, however long these take, and then somewhere in what follows.
      let left = 9 + ((round * 5) % 23);
      let killer: NodeJS.Timeout | undefined;
      const answered = (): void => {
        if (--left === 0) killer = setTimeout(() => child.kill('SIGKILL'), (round * 7) % 12);
      };
      try {
        for (;;) {
          const batch = new Map<number, number>();
          for (let i = 0; i < 8; i++) {
            const slot = (seed * 2_654_435_761) % (SIZE / SLOT);
            const mine = seed++;
            if (batch.has(slot)) continue;
            batch.set(slot, mine);
            sent.set(slot, [...(sent.get(slot) ?? []), mine]);
            const outcome = await client.outcome(
              { command: 1, offset: slot * SLOT, length: SLOT },
              patternBytes(SLOT, mine),
            );
            expect(outcome).toBe(0);
            answered();
          }
          client.write(requestBytes({ command: 3 }));
          await client.reply();
          flushes++;
          answered();
          for (const [slot, mine] of batch) {
            flushed.set(slot, mine);
            sent.delete(slot);
          }
        }
      } catch (error) {
        if (!(error instanceof Error) || error.name !== 'EndOfStream') throw error;
      } finally {
        clearTimeout(killer);
        child.kill('SIGKILL');
        await exited;
        client.close();
      }
    }
    console.log(`overlay: ${KILLS} kills, ${flushes} flushes, ${flushed.size} pieces checked`);
    expect(flushes).toBeGreaterThan(KILLS);
  });
});
