"""Everyday categories and common words of each, for the data sets `categories` and `synthetic`: general knowledge,
compiled for them.

A word is in one category only, and no category holds another.
"""

WORDS = """
fruits: apple banana cherry grape lemon mango melon orange peach pear plum strawberry pineapple kiwi apricot coconut
vegetables: carrot onion potato cabbage spinach broccoli cucumber lettuce celery pea pumpkin radish garlic turnip eggplant
tools: hammer saw drill wrench screwdriver pliers chisel axe shovel rake crowbar pickaxe hoe clamp sandpaper
musical instruments: piano guitar violin drum flute trumpet cello harp clarinet saxophone banjo trombone accordion oboe tuba
farm animals: cow pig sheep goat horse donkey chicken ox lamb calf mule piglet bull pony hen
birds: eagle sparrow owl robin pigeon crow hawk parrot swan falcon seagull woodpecker ostrich penguin peacock stork
wild animals: lion tiger elephant giraffe zebra monkey bear wolf fox leopard gorilla hippopotamus rhinoceros kangaroo hyena
sea animals: shark whale dolphin octopus crab lobster jellyfish starfish squid shrimp oyster walrus clam seahorse mussel
fish: salmon tuna trout cod herring sardine carp catfish eel mackerel anchovy halibut haddock swordfish sturgeon
insects: ant bee butterfly mosquito wasp beetle moth grasshopper ladybug dragonfly termite cockroach flea caterpillar hornet
reptiles and amphibians: snake lizard turtle crocodile iguana gecko chameleon alligator tortoise cobra viper frog toad newt salamander
trees: oak pine maple birch willow cedar elm spruce palm beech poplar fir sycamore redwood cypress
flowers: rose tulip daisy lily orchid sunflower violet daffodil carnation lavender poppy iris marigold peony lilac
parts of the body: head arm leg hand foot knee elbow shoulder finger toe neck ear nose mouth ankle wrist
clothes: shirt trousers jacket skirt dress sweater coat scarf sock glove blouse vest jeans shorts pajamas
gems: diamond ruby emerald sapphire pearl opal topaz amethyst jade garnet amber turquoise onyx agate aquamarine
metals: iron gold silver copper tin zinc lead aluminum nickel steel bronze brass titanium platinum tungsten
colors: red blue green yellow purple pink brown black white gray beige crimson magenta maroon scarlet
furniture: chair table sofa bed desk shelf cupboard wardrobe stool bench bookcase dresser couch armchair nightstand
things for cooking and eating: spoon fork knife pan pot plate bowl ladle spatula whisk grater kettle colander cup saucepan
electrical appliances: refrigerator oven toaster microwave dishwasher blender freezer vacuum heater mixer fan juicer humidifier stove dehumidifier
road vehicles: car truck bus van taxi motorcycle tractor ambulance bicycle scooter limousine jeep minivan trailer lorry
boats and ships: canoe kayak ferry yacht sailboat submarine raft tanker gondola rowboat speedboat frigate barge steamship dinghy
countries: France Germany Italy Spain Japan China Brazil Canada India Mexico Egypt Kenya Sweden Norway Poland Peru
cities: London Paris Rome Berlin Madrid Tokyo Moscow Chicago Boston Vienna Dublin Prague Athens Cairo Sydney Toronto
rivers: Nile Amazon Danube Rhine Mississippi Thames Ganges Volga Seine Congo Mekong Yangtze Tigris Euphrates Indus
states of America: Texas California Florida Ohio Alaska Hawaii Nevada Oregon Utah Kansas Iowa Montana Maine Virginia Michigan
professions: doctor teacher lawyer farmer nurse carpenter plumber pilot dentist engineer tailor butcher barber electrician chef
relatives: mother father sister brother aunt uncle cousin nephew niece grandfather grandmother son daughter husband wife
sports: football basketball tennis baseball hockey golf swimming boxing rugby volleyball skiing wrestling badminton cricket gymnastics
games: chess poker checkers dominoes bingo backgammon solitaire hopscotch charades marbles scrabble blackjack roulette darts billiards
dances: waltz tango ballet salsa polka foxtrot samba rumba flamenco jive mambo quickstep bolero minuet limbo
drinks: water milk coffee tea juice beer wine soda lemonade whiskey vodka cocoa cider champagne brandy rum
herbs and spices: pepper salt cinnamon basil oregano thyme ginger paprika turmeric nutmeg cumin rosemary saffron parsley mint vanilla
desserts: cake pie cookie pudding brownie donut custard tart muffin cupcake cheesecake pastry sundae sorbet jelly
weather: rain snow wind storm fog hail thunder lightning cloud sunshine drizzle hurricane tornado blizzard frost
land forms: mountain valley hill desert island canyon cliff beach volcano plateau peninsula plain swamp glacier ravine
bodies of water: ocean sea lake river pond stream bay gulf lagoon creek reservoir waterfall canal fjord brook
buildings: house school hospital church hotel museum library castle factory palace cathedral skyscraper barn warehouse temple cottage
parts of a house: kitchen bathroom bedroom attic basement garage balcony hallway porch ceiling roof chimney staircase window door
parts of a car: engine wheel brake clutch windshield bumper tire radiator gearbox dashboard headlight muffler piston axle exhaust
weapons: sword rifle pistol spear dagger cannon arrow bomb grenade missile musket lance crossbow revolver bayonet
office supplies: pen pencil eraser paper notebook stapler ruler marker crayon envelope folder sharpener scissors glue calculator
school subjects: mathematics history geography chemistry physics biology algebra geometry literature economics philosophy psychology sociology astronomy grammar
emotions: joy anger sadness fear love hate jealousy surprise shame pride guilt grief envy disgust happiness
illnesses: flu measles cancer diabetes asthma malaria pneumonia tuberculosis smallpox cholera arthritis mumps bronchitis polio influenza
fabrics: cotton wool silk linen denim velvet leather nylon polyester satin lace corduroy felt flannel cashmere
building materials: brick concrete cement plaster stone granite marble glass tile wood plywood asphalt gravel limestone clay
shapes: circle square triangle rectangle oval cube sphere pyramid cone cylinder hexagon pentagon octagon rhombus trapezoid
units of measure: meter mile inch kilogram pound ounce liter gallon yard centimeter ton kilometer gram millimeter acre
money: dollar euro yen peso rupee franc ruble dinar shilling lira yuan krone rand cent penny
languages: English Spanish French German Italian Russian Chinese Japanese Arabic Portuguese Dutch Greek Latin Hebrew Korean Turkish
computers and their parts: keyboard monitor printer processor scanner router laptop webcam modem joystick motherboard server touchpad hard-drive memory
creatures of myths: dragon unicorn fairy mermaid vampire werewolf ghost goblin troll elf dwarf phoenix centaur witch ogre
royal titles: king queen prince princess duke emperor baron knight duchess countess sultan pharaoh empress earl czar
military ranks: captain sergeant colonel lieutenant admiral corporal commander general major marshal private brigadier ensign cadet commodore
crimes: murder theft robbery fraud arson kidnapping burglary assault bribery forgery blackmail smuggling treason vandalism piracy
things in space: planet star moon comet asteroid galaxy meteor sun nebula satellite constellation supernova quasar pulsar spaceship
bathroom items: soap shampoo towel toothbrush toothpaste comb razor mirror sponge toilet sink shower bathtub faucet hairbrush
kinds of music: jazz blues reggae opera punk techno disco folk soul gospel funk rap ska grunge bluegrass
kinds of writing: novel poem essay biography fable sonnet memoir ballad haiku diary article editorial epic manuscript autobiography
parts of a plant: root stem leaf seed petal branch twig bud thorn trunk pollen sap stalk blossom bark
breeds of dogs: poodle bulldog beagle collie terrier labrador dalmatian greyhound spaniel rottweiler chihuahua husky dachshund pug mastiff
times: minute hour week month year decade century morning evening noon midnight afternoon weekend dawn dusk
people in government: president senator mayor governor minister chancellor ambassador congressman councilor premier diplomat delegate secretary treasurer candidate
performers: actor singer dancer comedian magician clown acrobat juggler musician pianist drummer violinist guitarist ballerina ventriloquist
containers: box bottle jar bucket basket barrel bag crate tub vase carton pouch sack suitcase can
numbers: one two three four five six seven eight nine ten twelve fifteen twenty hundred thousand
names of women: Mary Anna Emma Sarah Laura Alice Emily Julia Susan Karen Linda Nancy Helen Sophia Olivia
names of men: John Peter David Michael James Robert Thomas William George Henry Charles Daniel Edward Frank Paul
composers: Mozart Beethoven Bach Chopin Brahms Haydn Vivaldi Schubert Wagner Verdi Handel Tchaikovsky Liszt Mahler Debussy
painters: Picasso Rembrandt Monet Michelangelo Raphael Vermeer Matisse Goya Cezanne Renoir Dali Klimt Rubens Titian Degas
scientists: Newton Einstein Darwin Galileo Curie Pasteur Faraday Kepler Copernicus Edison Tesla Bohr Mendel Archimedes Maxwell
writers: Shakespeare Dickens Tolstoy Hemingway Austen Homer Dante Goethe Twain Kafka Orwell Chekhov Turgenev Joyce Byron
Greek gods: Zeus Apollo Athena Hermes Poseidon Hera Ares Aphrodite Hades Artemis Dionysus Demeter Hephaestus Eros Persephone
"""  # noqa: E501 - a category is a line

CATEGORIES: dict[str, tuple[str, ...]] = {
    name: tuple(words.split()) for name, _, words in (line.partition(": ") for line in WORDS.strip().splitlines())
}
