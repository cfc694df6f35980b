/** The line to the tiny VM when it reads block devices, and what LVM there says of its volumes. */
import { expect, it } from 'vitest';

import type { FoundArea } from '../../../src/files/layout.js';
import { BlockClient, GuestReadError, MAX_REQUEST_BYTES } from '../../../src/files/vm-blocks.js';
import { imageOfEdges, parseVolumes } from '../../../src/files/vm.js';
import { ManualClock } from '../../support/manual-clock.js';
import { systemClock } from '../../../src/clock.js';

interface Bed {
  readonly client: BlockClient;
  readonly sent: string[];
  readonly stalled: Error[];
}

function bed(clock = systemClock, progress = (): number => 0): Bed {
  const sent: string[] = [];
  const stalled: Error[] = [];
  const client = new BlockClient({
    clock,
    progress,
    send: (line) => void sent.push(line),
    stalled: (error) => {
      stalled.push(error);
      client.fail(error);
    },
  });
  return { client, sent, stalled };
}

it('answers come in any order and in any pieces', async () => {
  const { client, sent } = bed();
  const a = Buffer.alloc(3);
  const b = Buffer.alloc(5);
  const both = Promise.all([
    client.read('dm-1', a, 7),
    client.read('dm-12', b, 4_503_599_627_370_496),
  ]);
  expect(sent).toEqual(['1 dm-1 7 3\n', '2 dm-12 4503599627370496 5\n']);
  for (const byte of Buffer.from('B2 0 5\nB\n1 0B1 0 3\nxyz')) client.take(Buffer.of(byte));
  await both;
  expect([a.toString(), b.toString()]).toEqual(['xyz', 'B\n1 0']);
  client.fail(new Error('the end'));
});

it('a long read is several requests', async () => {
  const { client, sent } = bed();
  const into = Buffer.alloc(MAX_REQUEST_BYTES + 10);
  const read = client.read('dm-0', into, 0);
  expect(sent).toEqual([`1 dm-0 0 ${MAX_REQUEST_BYTES}\n`, `2 dm-0 ${MAX_REQUEST_BYTES} 10\n`]);
  client.take(Buffer.concat([Buffer.from('B2 0 10\n'), Buffer.alloc(10, 2)]));
  client.take(
    Buffer.concat([Buffer.from(`B1 0 ${MAX_REQUEST_BYTES}\n`), Buffer.alloc(MAX_REQUEST_BYTES, 1)]),
  );
  await read;
  expect([into[0], into[MAX_REQUEST_BYTES - 1], into[MAX_REQUEST_BYTES]]).toEqual([1, 1, 2]);
  client.fail(new Error('the end'));
});

it('an error of the guest is one of that request alone', async () => {
  const { client } = bed();
  const bad = client.read('dm-3', Buffer.alloc(4), 8);
  const good = client.read('dm-3', Buffer.alloc(1), 0);
  client.take(Buffer.from('B1 5 0\nB2 0 1\n!'));
  await expect(bad).rejects.toMatchObject({ errno: 5 });
  await expect(bad).rejects.toBeInstanceOf(GuestReadError);
  await good;
  client.fail(new Error('the end'));
});

it.each([
  ['another length', 'B1 0 3\nabc'],
  ['an error with bytes', 'B1 5 4\n'],
  ['a number that was not asked for', 'B9 0 4\n'],
  ['the same one twice', 'B1 0 4\nabcdB1 0 4\n'],
  ['something else', 'hello\n'],
  ['a line without an end', 'B'.repeat(70)],
])('nonsense is an error: %s', async (_, text) => {
  const { client } = bed();
  const read = client.read('dm-1', Buffer.alloc(4), 0);
  read.catch(() => undefined);
  expect(() => client.take(Buffer.from(text))).toThrow(/senseless/);
  client.fail(new Error('broken'));
  await expect(client.read('dm-1', Buffer.alloc(1), 0)).rejects.toThrow('broken');
});

it('when the guest ends, everything that waits and comes fails, half answers too', async () => {
  const { client, sent } = bed();
  const half = client.read('dm-1', Buffer.alloc(8), 0);
  const whole = client.read('dm-1', Buffer.alloc(8), 8);
  client.take(Buffer.from('B1 0 8\nhalf'));
  client.fail(new Error('gone'));
  await expect(half).rejects.toThrow('gone');
  await expect(whole).rejects.toThrow('gone');
  await expect(client.read('dm-1', Buffer.alloc(8), 8)).rejects.toThrow('gone');
  expect(sent.length).toBe(2);
  // What still comes is nobody's.
  client.take(Buffer.from('more'));
});

it('a guest that hangs is given up, one that waits for the image is not', async () => {
  const hung = bed(new ManualClock());
  await expect(hung.client.read('dm-1', Buffer.alloc(8), 0)).rejects.toThrow(
    'has not answered for 120 seconds',
  );
  expect(hung.stalled.length).toBe(1);

  let reads = 0;
  const slow = bed(new ManualClock(), () => {
    reads++;
    // Long after the limit, the image has been read and the guest answers.
    if (reads === 100) slow.client.take(Buffer.from('B1 0 1\n!'));
    return reads;
  });
  await slow.client.read('dm-1', Buffer.alloc(1), 0);
  expect(slow.stalled).toEqual([]);
});

it('what LVM lists: sizes are those of the devices, pools are none, what did not start is named', () => {
  const container: FoundArea = {
    name: 'p1',
    type: 'LVM2_member',
    offsetBytes: 0,
    sizeBytes: 1,
    holds: 'container',
    devices: 1,
    groups: [
      { id: 'aaaa-bb', shown: 'disk-aaaa-b', place: 'p1', places: ['p1'], isPartial: false },
    ],
  };
  const stdout = `  aaaa-bb/disk/thin/3/thin,sparse
  aaaa-bb/disk/pool/-1/thin,pool
  cccc-dd/vg/snap/12/linear
  cccc-dd/vg/broken/-1/raid,raid5,raid5_ls
/dm-3/16
/dm-12/2048
`;
  const said =
    '  Refusing activation of partial LV vg/broken. Use --partial\n  2 volumes started\n';
  expect(parseVolumes(stdout, said, [container])).toEqual({
    volumes: [
      { name: 'disk-aaaa-b/thin', device: 'dm-3', sizeBytes: 8192 },
      { name: 'vg/snap', device: 'dm-12', sizeBytes: 1_048_576 },
    ],
    left: [
      {
        place: '',
        volume: 'vg/broken',
        reason:
          'vg/broken: LVM cannot start it (Refusing activation of partial LV vg/broken. Use --partial)',
      },
    ],
  });
});

it('of a volume that is not looked through the beginning and the end are known', async () => {
  const [edge, sizeBytes] = [16, 100];
  const known = Buffer.from(Array.from({ length: 2 * edge }, (_, i) => i + 1));
  const whole = Buffer.alloc(sizeBytes);
  known.copy(whole, 0, 0, edge);
  known.copy(whole, sizeBytes - edge, edge);
  const image = imageOfEdges(known, edge, sizeBytes);
  for (const [from, to] of [
    [0, 100],
    [3, 9],
    [10, 90],
    [20, 80],
    [80, 100],
    [84, 85],
    [99, 100],
  ] as const) {
    const into = Buffer.alloc(to - from, 0xff);
    await image.read(into, from);
    expect(into).toEqual(whole.subarray(from, to));
  }
  // One that is all edge comes twice.
  const small = imageOfEdges(Buffer.concat([whole, whole]), sizeBytes, sizeBytes);
  const into = Buffer.alloc(50);
  await small.read(into, 50);
  expect(into).toEqual(whole.subarray(50));
});
